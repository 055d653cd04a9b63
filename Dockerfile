FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -o /lumiere .

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /lumiere /lumiere
USER nonroot
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["/lumiere", "healthcheck", "-live"]
ENTRYPOINT ["/lumiere"]
