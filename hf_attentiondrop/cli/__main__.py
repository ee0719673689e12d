"""`python -m hf_attentiondrop.cli`, for where scripts are not on the path."""

import sys

from . import main


sys.exit(main())
