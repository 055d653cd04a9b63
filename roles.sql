-- The two roles of a deployment and its database, made once by a superuser. The owner's role is for `lumiere migrate` alone. The
-- service's role owns nothing; `lumiere migrate` grants it what grants.sql says. psql is of version 14 or later:
--
--   OWNER_PASSWORD=… SERVICE_PASSWORD=… psql -f roles.sql postgres://postgres@db.example/postgres

\set ON_ERROR_STOP on
\getenv owner_password OWNER_PASSWORD
\getenv service_password SERVICE_PASSWORD

CREATE ROLE lumiere_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE lumiere_service LOGIN PASSWORD :'service_password';
CREATE DATABASE lumiere OWNER lumiere_owner;

-- Who can make a table, a temporary one too, can hide a table of the schema behind it.
REVOKE TEMPORARY ON DATABASE lumiere FROM PUBLIC;
\connect lumiere
ALTER SCHEMA public OWNER TO lumiere_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
