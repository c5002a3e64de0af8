from hypothesis import settings

# The first example of a test can pay for imports and caches; how long one takes says nothing about the code.
settings.register_profile("data", deadline=None)
settings.load_profile("data")
