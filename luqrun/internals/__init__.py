"""What luqrun asks of libraries through interfaces that they do not promise: all of it is here, and each has a test.

A module a library, since the command line must not load torch for what it asks of Hydra, nor quantizers Hydra.
"""
