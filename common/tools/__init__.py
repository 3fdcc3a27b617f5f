"""Commands on what the scripts have made: python -m common.tools.<name>."""
