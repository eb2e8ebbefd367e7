"""Ways to move bytes between the ranks of a group.

Each is a `Communicator`; a GroupCoordinator picks one per call.
"""
