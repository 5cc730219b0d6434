"""A trained model put to use: loaded, generating, exported, registered."""
