import sys
from pathlib import Path

# importlib mode puts no test directory on the path; the topologies are shared by these tests
sys.path.insert(0, str(Path(__file__).parent))
