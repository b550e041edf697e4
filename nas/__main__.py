"""``python -m nas`` is ``nas``."""

from nas.cli import main

raise SystemExit(main())
