"""Saved models to and from the Hub.

``export`` writes or uploads what a repository of a saved model holds, ``convert`` makes pipelines of other people's
models, and ``cli`` has the command lines of both.
"""
