import sys
from pathlib import Path

# importlib mode puts no test directory on the path
HERE = Path(__file__).parent
ROOMS = ("cardpci", "vfiouser", "card", "trust")
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ROOMS)]
