# A Chromium for tests/test_report.py, which it looks for on the PATH and where playwright puts its own. Without one those tests are skipped.
have() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
have > /dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then  # a container, as CI is
    apt="apt-get install -y -q --no-install-recommends chromium"
    { $apt || { apt-get update -q && $apt; }; } > .venv/browser.log 2>&1 && have > /dev/null && exit 0
fi
timeout 120 .venv/bin/playwright install --only-shell chromium > .venv/browser.log 2>&1 && exit 0
echo "no Chromium (see .venv/browser.log): the report is not tested in a browser; install chromium to have that"
