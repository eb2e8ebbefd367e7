"""`python -m shardlib` is the command `shardlib`."""

from shardlib.cli import main

raise SystemExit(main())
