"""A solution that answers requests, and the folder that it is kept in.

In: a fitted model, its training set, and ids of samples. Out: new parameters with a certificate of what is known of
them, and another ``State``; durable in a folder (``disk``) if it has one.
"""
