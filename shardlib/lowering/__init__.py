"""From an explicit program to the Python that one rank runs."""
