"""What a user runs or copies first: every file beside this one is a program."""
