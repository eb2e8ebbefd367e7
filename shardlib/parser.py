"""Another name of `shardlib.compiler.parser`."""
from shardlib.compiler.parser import CORE, check, parse_program

__all__ = ["CORE", "check", "parse_program"]
