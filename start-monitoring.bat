@echo off
rem Starts the monitoring stack on Windows: double-click, or run it in a terminal.
rem The same as scripts/up on Linux and macOS. ASCII only and CRLF line ends, for cmd.exe.
rem
rem Checks that Docker Desktop is installed and running (starts it and waits if need be), starts
rem the containers, waits until they are healthy and opens Grafana. Safe to run again.

cd /d "%~dp0"
setlocal EnableExtensions EnableDelayedExpansion

set "DRY_RUN="
set "NO_PAUSE="
set "START_SECONDS=180"
set "HEALTHY_SECONDS=900"

rem Double-clicked: this window was opened for this file, and closes with it unless it waits.
set "DOUBLE_CLICKED="
set "INVOKED=!CMDCMDLINE:"=!"
if not "!INVOKED:%~nx0=!"=="!INVOKED!" set "DOUBLE_CLICKED=1"

:arguments
if "%~1"=="" goto :check_installed
if /i "%~1"=="--dry-run" (
    set "DRY_RUN=1"
    shift
    goto :arguments
)
if /i "%~1"=="--no-pause" (
    set "NO_PAUSE=1"
    shift
    goto :arguments
)
if /i "%~1"=="--help" goto :help
if "%~1"=="/?" goto :help
call :fail 2 "Unknown argument: %~1" "Run start-monitoring.bat --help to see what there is."
goto :finish

:help
echo Starts Prometheus, Alertmanager, Grafana and what .env selects, and opens Grafana.
echo.
echo usage: start-monitoring.bat [--dry-run] [--no-pause]
echo   --dry-run    print what would be done
echo   --no-pause   do not wait for a key at the end
echo.
echo exit codes:
echo    0  up and healthy
echo    2  wrong usage
echo    8  the profiles demo and gpu are both on
echo    9  the rest of the project is not beside this file
echo   10  Docker Desktop is not installed
echo   11  Docker Desktop is not running and cannot be started from here
echo   12  Docker Desktop was started but did not get ready
echo   13  Docker runs Windows containers; Linux containers are needed
echo   14  Docker Compose version 2 is missing
echo   15  Docker is too old
echo   16  docker-compose.yml or .env has a mistake
echo   17  a port is taken
echo   18  the images cannot be downloaded
echo   19  the worker's image cannot be built
echo   20  the containers cannot be started
echo   21  a container is not healthy
set "CODE=0"
goto :finish

:check_installed
rem Also where this file lies on a network path: cmd.exe cannot change into one.
if not exist "docker-compose.yml" (
    call :fail 9 "There is no docker-compose.yml beside this file." "Unpack the whole project into a folder on a local drive, then run this file there."
    goto :finish
)
call :setting COMPOSE_PROFILES demo
set "PROFILES=,!VALUE!,"
set "WORKER="
if not "!PROFILES:,demo,=!"=="!PROFILES!" set "WORKER=demo"
if not "!PROFILES:,gpu,=!"=="!PROFILES!" set "WORKER=!WORKER!gpu"
if "!WORKER!"=="demogpu" (
    call :fail 8 "The profiles demo and gpu serve on the same ports." "Choose one of them for COMPOSE_PROFILES in .env."
    goto :finish
)
echo [1/6] Docker Desktop
if defined DRY_RUN (
    echo would check: docker is installed, runs Linux containers, has Compose 2
    goto :check_config
)
where docker >nul 2>&1
if errorlevel 1 if exist "%ProgramFiles%\Docker\Docker\resources\bin\docker.exe" set "PATH=%PATH%;%ProgramFiles%\Docker\Docker\resources\bin"
where docker >nul 2>&1
if errorlevel 1 (
    call :fail 10 "Docker Desktop is not installed." "Install Docker Desktop for Windows, start it once, then run this file again."
    goto :finish
)

docker info >nul 2>&1
if not errorlevel 1 goto :check_engine
if not exist "%ProgramFiles%\Docker\Docker\Docker Desktop.exe" (
    call :fail 11 "The Docker engine does not answer." "Start Docker, wait until it runs, then run this file again."
    goto :finish
)
echo       not running; starting it, which takes a minute
start "" "%ProgramFiles%\Docker\Docker\Docker Desktop.exe"
set "WAITED=0"

:wait_for_engine
call :sleep 3
docker info >nul 2>&1
if not errorlevel 1 goto :check_engine
set /a WAITED+=3
if !WAITED! lss %START_SECONDS% goto :wait_for_engine
call :fail 12 "Docker Desktop did not get ready within %START_SECONDS% seconds." "Look at its window: it may ask for a WSL update, a restart or its terms. Then run this file again."
goto :finish

:check_engine
set "SERVER_OS="
for /f "delims=" %%v in ('docker version --format "{{.Server.Os}}" 2^>nul') do set "SERVER_OS=%%v"
if /i not "!SERVER_OS!"=="linux" (
    call :fail 13 "Docker runs Windows containers." "Right-click the Docker icon beside the clock, choose Switch to Linux containers, then run this file again."
    goto :finish
)
docker compose version >nul 2>&1
if errorlevel 1 (
    call :fail 14 "Docker Compose version 2 is missing." "Update Docker Desktop, then run this file again."
    goto :finish
)
set "SERVER_MAJOR=0"
for /f "delims=." %%v in ('docker version --format "{{.Server.Version}}" 2^>nul') do set "SERVER_MAJOR=%%v"
if !SERVER_MAJOR! lss 25 (
    call :fail 15 "This Docker is too old: version 25 or newer is needed." "Update Docker Desktop, then run this file again."
    goto :finish
)

:check_config
echo [2/6] Configuration
call :run docker compose config --quiet
if errorlevel 1 (
    call :fail 16 "There is a mistake in docker-compose.yml or .env; see the message above." "Undo the last change to .env, or correct it."
    goto :finish
)

echo [3/6] Ports
set "RUNNING="
if defined DRY_RUN (
    echo would check: the ports are free
    goto :images
)
rem Ours hold them when the stack runs already.
for /f "delims=" %%c in ('docker compose ps --quiet 2^>nul') do set "RUNNING=1"
if defined RUNNING goto :images
set "TAKEN="
call :check_port GRAFANA_PORT 3010
call :check_port PROMETHEUS_PORT 9090
call :check_port ALERTMANAGER_PORT 9093
if defined WORKER call :check_port WORKER_API_PORT 8000
if defined WORKER call :check_port WORKER_SYSTEM_PORT 8081
if not "!PROFILES:,fleet,=!"=="!PROFILES!" call :check_port KV_INDEX_PORT 8082
if not "!PROFILES:,nats,=!"=="!PROFILES!" call :check_port NATS_PORT 4222
if defined TAKEN (
    call :fail 17 "Taken by another program:!TAKEN!" "Stop that program, or remove the # before the setting in .env and choose another port."
    goto :finish
)

:images
echo [4/6] Images (the first time some gigabytes are downloaded)
call :run docker compose pull --policy missing prometheus alertmanager grafana
if errorlevel 1 (
    call :fail 18 "The images cannot be downloaded; see the message above." "Check the internet connection and the proxy settings of Docker Desktop."
    goto :finish
)
call :run docker compose build
if errorlevel 1 (
    call :fail 19 "The worker's image cannot be built; see the message above." "Behind a company proxy, set BUILD_CA_FILE in .env to its root certificates."
    goto :finish
)

echo [5/6] Starting
call :run docker compose up --detach --remove-orphans
if errorlevel 1 (
    call :fail 20 "The containers cannot be started; see the message above." "docker compose logs shows more."
    goto :finish
)
call :run docker compose up --detach --wait --wait-timeout %HEALTHY_SECONDS%
if errorlevel 1 (
    docker compose ps --all
    call :fail 21 "A container is not healthy; see the list above." "docker compose logs NAME shows why."
    goto :finish
)
rem It ran already: rules and notification channels are read again.
if defined RUNNING call :run docker compose restart alertmanager
if defined RUNNING call :run docker compose kill --signal SIGHUP prometheus

call :setting GRAFANA_PORT 3010
set "GRAFANA=http://localhost:!VALUE!"
echo [6/6] Ready: !GRAFANA!   user admin, password admin unless you set GRAFANA_ADMIN_PASSWORD
call :setting PROMETHEUS_PORT 9090
echo       Prometheus http://localhost:!VALUE!   stop everything: docker compose down
call :run start "" "!GRAFANA!"
set "CODE=0"
goto :finish

:finish
if defined DOUBLE_CLICKED if not defined NO_PAUSE pause
exit /b %CODE%

rem ---- subroutines -------------------------------------------------------------------------

rem fail CODE MESSAGE FIX
:fail
echo.
echo ERROR %~1: %~2
echo   What to do: %~3
echo.
set "CODE=%~1"
exit /b 0

rem run COMMAND: runs it, or with --dry-run prints it.
:run
if defined DRY_RUN (
    echo would run: %*
    exit /b 0
)
%*
exit /b %errorlevel%

rem setting NAME DEFAULT: sets VALUE from the environment, then .env, then the default.
:setting
set "VALUE=!%~1!"
if defined VALUE exit /b 0
set "VALUE=%~2"
if not exist ".env" exit /b 0
for /f "usebackq eol=# tokens=1,2 delims==" %%a in (".env") do if /i "%%a"=="%~1" set "VALUE=%%b"
exit /b 0

rem check_port SETTING DEFAULT: adds to TAKEN when somebody listens on it. The state column of
rem netstat is translated on some systems, the address of a listener's peer is not.
:check_port
call :setting %~1 %~2
netstat -ano -p tcp | findstr /r /c:":!VALUE! .*0\.0\.0\.0:0 " >nul 2>&1
if not errorlevel 1 set "TAKEN=!TAKEN! port !VALUE! (%~1)"
exit /b 0

rem sleep SECONDS: timeout.exe fails where input is redirected, ping does not.
:sleep
set /a PINGS=%~1+1
ping -n !PINGS! 127.0.0.1 >nul
exit /b 0
