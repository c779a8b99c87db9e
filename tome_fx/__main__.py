"""``python -m tome_fx``: see `tome_fx.cli`."""

import sys

from tome_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
