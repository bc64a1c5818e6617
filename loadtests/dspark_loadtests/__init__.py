"""Load tests for a streaming chat server, honest about speculative decoding.

The library measures; ``loadtests/locustfile.py`` drives. Nothing here imports locust, so
the same records and reports serve any other generator.
"""
