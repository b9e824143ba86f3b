"""What this system is compared with, each a main module in a process of its own.

`common` has the data, the clock and the steps that all share. Nothing here uses the parameter
server, the workers or the shuffler of this system.
"""
