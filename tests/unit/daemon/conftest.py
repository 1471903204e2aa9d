import sys
from pathlib import Path

# importlib mode puts no test directory on the path; the host data is shared by all policy tests
sys.path.insert(0, str(Path(__file__).parent))
