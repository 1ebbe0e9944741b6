"""Sources of metrics → one page → text; knows no worker and no vLLM.

Imports nothing here: prometheus_client must not be imported before `multiprocess` has looked.
"""
