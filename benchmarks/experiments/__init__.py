"""Prototypes beyond the compiler, checked and counted; one enters the package only if a measured chip says so."""
