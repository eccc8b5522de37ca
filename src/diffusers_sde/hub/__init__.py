"""To the Hub and back.

``flattening`` writes the package's source as one file, ``shipping`` puts that file beside what is saved, ``cards``
writes model cards, ``uploads`` talks to the Hub, ``pipelines`` is how pipelines do all of it, and ``export`` does it
for a saved model. Schedulers import ``shipping``, so nothing is imported here.
"""
