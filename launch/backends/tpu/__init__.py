"""TPU slices of Google Cloud, through the `gcloud` command line and ssh.

The controller is `muster run` itself. `fleet` gets slices and gives them back, and writes down what
it asks for before it asks (`ledger`); `prepare` brings code and environment to every TPU VM; `link`
keeps up the way to the agent on each; `machines` is what the controller sees of them all.
"""
