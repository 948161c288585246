"""`python -m alignlab` is the command `alignlab`; launchers start it as a module."""

import sys

from alignlab.cli import main

sys.exit(main())
