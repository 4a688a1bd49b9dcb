"""Exit with 0 if `GET /health` answers: health.py URL [CA_FILE]."""

import ssl
import sys
import urllib.request

context = ssl.create_default_context(cafile=sys.argv[2]) if sys.argv[2:] else None
urllib.request.urlopen(sys.argv[1], timeout=5, context=context)
