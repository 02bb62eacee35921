# PostgreSQL with clients that bench it over and over, until there is a file stop: postgres.sh FOLDER-OF-PROGRAMS FOLDER
set -e
programs=$1
cd "$2"
"$programs/initdb" -D data -A trust -U postgres >/dev/null
"$programs/postgres" -D data -k "$2" -c listen_addresses= -c max_connections=20 -c shared_buffers=16MB &
until "$programs/psql" -h "$2" -U postgres -c 'select 1' >/dev/null 2>&1; do sleep 0.1; done
"$programs/pgbench" -h "$2" -U postgres -i -q -s 1 postgres
touch ready
while [ ! -e stop ]; do
    "$programs/pgbench" -h "$2" -U postgres -n -c 4 -j 2 -t 200 postgres >>bench 2>&1 || echo "pgbench: $?" >>failed
done
"$programs/pg_ctl" -D data -m fast -w stop >/dev/null
wait
