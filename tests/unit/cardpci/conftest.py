import sys
from pathlib import Path

# importlib mode puts no test directory on the path
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("vfiouser", "card", "trust"))]
