import pytest

from ext_common.cli import UsageError
from fairseq_ext.translation.prepare.__main__ import PrepareOptions
from fairseq_ext.translation.score.__main__ import ScoreOptions
from fairseq_ext.translation.text.languages import check_code, language


@pytest.mark.parametrize(
    "code", "en zh zh_Hant zh-Hant-TW cmn deu ger yue fil qaa qtz roa gmw sr_Latn EN".split()
)
def test_codes_of_languages_pass(code):
    check_code(code, "--lang")


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("cn", "zh"),
        ("jp", "ja"),
        ("kr", "ko"),
        ("ua", "uk"),
        ("chinese", "zh"),
        ("germn", "de"),
        ("zh_CN".lower().replace("zh_", ""), "zh"),
        ("Japanese", "ja"),
        ("czech", "cs"),
    ],
)
def test_other_codes_are_refused_with_the_nearest(code, meant):
    with pytest.raises(UsageError, match=rf"--lang {code} is no code.*mean {meant} "):
        check_code(code, "--lang")


def test_a_code_like_no_other_is_refused_with_what_is_free():
    with pytest.raises(UsageError, match="qaa to qtz"):
        check_code("xq", "--lang")


def test_the_commands_ask():
    with pytest.raises(UsageError, match="--target-lang cn .* zh"):
        PrepareOptions("en", "cn")
    with pytest.raises(UsageError, match="--lang chinese .* zh"):
        ScoreOptions(lang="chinese")


def test_one_language_has_one_code():
    assert {language(code) for code in ("zh", "zho", "chi", "cmn", "zh-Hant-TW", "ZH_cn")} == {"zh"}
    assert language("nld") == language("dut") == "nl"
