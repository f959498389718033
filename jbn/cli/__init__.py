"""The command line: what is typed becomes records of options, and a room of ``jbn.lab`` does the rest."""
