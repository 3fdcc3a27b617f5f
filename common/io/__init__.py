"""Black boxes behind the first room: files, formats, published weights."""
