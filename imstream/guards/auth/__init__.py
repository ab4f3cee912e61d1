"""Authentication by JSON Web Tokens (JWT, RFC 7519): verification rules and keys."""
