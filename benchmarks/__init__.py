"""Measurements of jbn and of its rivals; none of it is installed with the library."""
