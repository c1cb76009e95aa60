"""Opening what training has written."""
