"""Keys: who may speak to a learner over the network, and as what.

consumes  key files and the list of allowed keys in one folder, made by `orz keys`
produces  CURVE settings for the sockets of the broker and of the weights, and names for the keys behind their frames

    files.py   a key pair as a file that only its owner can read
    ring.py    the folder: new, list, revoke, rotate;  roster.py  its list as a running broker sees it
    curve.py   keys on a socket, and the gatekeeper that lets in who is on the list

A key pair of a generator opens both of a learner's ports, that of the broker and that of the weights.
"""
