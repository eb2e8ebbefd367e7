"""Where the helpers lie: workers are started by their path."""
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
