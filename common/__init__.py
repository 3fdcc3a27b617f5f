"""What the scripts share: videos, labels, views, backbones, evaluation, and the frame of a run."""


class UserError(Exception):
    """A mistake a user can mend: one sentence naming the file, line or flag, and what is right.

    A script shows it without a traceback and leaves with exit status 2.
    """
