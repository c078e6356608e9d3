"""One command, a verb a stage."""
