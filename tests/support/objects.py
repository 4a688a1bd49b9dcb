"""A SuperLink that has a reply as objects."""

from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse


class Link:
    """Answer what Flower's grid asks a SuperLink about replies.

    Parameters
    ----------
    response : bytes
        The serialised answer to whether there are replies.
    objects : dict[str, bytes]
        Objects by id.
    """

    def __init__(self, response: bytes, objects: dict[str, bytes]) -> None:
        self._response, self._objects = response, objects

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        return PullAppMessagesResponse.FromString(self._response)

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        content = self._objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None,
            object_available=True,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()
