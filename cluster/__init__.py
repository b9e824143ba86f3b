"""What runs the system: configuration and recipes, controller, launch, run folder, commands.

The only package that knows all the others. Everything that a user sees is in here.
"""
