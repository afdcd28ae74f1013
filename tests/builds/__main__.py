"""See tests/builds/__init__.py."""

import sys

from tests.builds import main

main(sys.argv[1])
