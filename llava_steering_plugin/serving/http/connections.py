"""The worker's connections: uvicorn's, which answer also where a number in the headers has thousands of digits."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_steering_plugin.serving.http.protocol import REFUSED, chunk

UNREADABLE = "The headers of the request cannot be read."


class Connection(H11Protocol):
    """Answers with 413 or 400 where h11 raises ValueError; uvicorn would close the connection without a word.

    Python refuses to read a number of more than 4,300 digits: h11 meets it in Content-Length.
    """

    def handle_events(self) -> None:
        """Handle what has arrived."""
        try:
            super().handle_events()
        except ValueError as error:
            if self.transport.is_closing():
                return
            status = b"413 Content Too Large" if "digits" in str(error) else b"400 Bad Request"
            body = chunk(UNREADABLE, REFUSED)
            head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            self.transport.write(head % (status, len(body)) + body)
            self.transport.close()
