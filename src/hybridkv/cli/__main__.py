"""`python -m hybridkv.cli`."""

import sys

from hybridkv.cli.main import main

sys.exit(main())
