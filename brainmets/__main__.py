"""`python -m brainmets` is the command `brainmets`."""
from brainmets.cli import main

if __name__ == "__main__": raise SystemExit(main())
