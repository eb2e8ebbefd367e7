"""What is said of a program that does not type: the words, and what could stand there instead."""
