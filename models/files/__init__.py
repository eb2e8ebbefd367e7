"""The files of a model: what they hold, in which format, and what is made of it where they disagree."""
