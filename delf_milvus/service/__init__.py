"""The HTTP service and its page: photos in, answers with proof out, over one `AsyncDelfIndex`.

`server` listens, `door` lets requests in, `routes` answers them, `queue` shares the processor among clients. Nothing is
fetched from an address that a client names, and nothing but the folders of the settings is read.
"""
