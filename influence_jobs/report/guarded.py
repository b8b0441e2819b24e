"""Access to the viewer's pages: only with the token."""

import hmac
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    b"content-security-policy": b"default-src 'none'; img-src 'self' data:; media-src 'self'; "
    b"style-src 'self' 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
}


class Guarded:
    """Refuses requests without the token, and adds security headers to every answer."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        await self._answer(Request(scope))(scope, receive, send_guarded)

    def _answer(self, request: Request) -> ASGIApp:
        cookie = f"infl-{request.url.port}"  # cookies ignore ports, and viewers share a host
        given = request.query_params.get("token")
        if given is None:
            right = self._is_right(request.cookies.get(cookie, ""))
            return self.app if right else _no_token
        if not self._is_right(given):
            return _no_token
        # Redirect to the address without the token: links, history and logs must not have it.
        rest = urlencode([(k, v) for k, v in request.query_params.multi_items() if k != "token"])
        path = f"/{request.url.path.lstrip('/')}"  # `//host` would lead to another site
        answer = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
        # Not "strict": that fails if the user clicks the link on another page.
        answer.set_cookie(cookie, given, httponly=True, samesite="lax")
        return answer

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


_no_token = PlainTextResponse(
    "This address needs its token: open the one that `infl view` printed.\n", status_code=401
)
