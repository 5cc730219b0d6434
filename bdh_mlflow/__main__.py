"""`python -m bdh_mlflow`: the same commands as the console script `bdh-mlflow`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # the current folder last: a user's random.py or mlflow.py there is not ours to run
    sys.path.append(sys.path.pop(0))

from bdh_mlflow.cli.main import main

if __name__ == "__main__":  # worker processes of the data loader import this module under another name
    main()
