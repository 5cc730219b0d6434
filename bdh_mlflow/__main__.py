"""`python -m bdh_mlflow`: the same front door as the console script `bdh-mlflow`."""

from bdh_mlflow.cli import main

main()
