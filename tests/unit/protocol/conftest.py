import sys
from pathlib import Path

# importlib mode puts no test directory on the path
sys.path.insert(0, str(Path(__file__).parent))
