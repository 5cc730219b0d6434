"""`python -m bdh_mlflow`: the same front door as the console script `bdh-mlflow`."""

from bdh_mlflow.cli.main import main

if __name__ == "__main__":  # worker processes import this module under another name
    main()
