"""Which codes are those of a language, and what was meant by one that is none.

ISO 639-1 and -2, and of -3 and -5 what CLDR has a name for or models are published under. A code that nobody
knows would silently be a language of spaces and of any script.
"""

import difflib
import functools

import regex

from ext_common.cli import UsageError

NAMES = dict(
    one.split(":")
    for one in """
    aa:Afar ab:Abkhazian ae:Avestan af:Afrikaans ak:Akan am:Amharic an:Aragonese ar:Arabic as:Assamese
    av:Avaric ay:Aymara az:Azerbaijani ba:Bashkir be:Belarusian bg:Bulgarian bi:Bislama bm:Bambara bn:Bangla
    bo:Tibetan br:Breton bs:Bosnian ca:Catalan ce:Chechen ch:Chamorro co:Corsican cr:Cree cs:Czech
    cu:Church_Slavic cv:Chuvash cy:Welsh da:Danish de:German dv:Divehi dz:Dzongkha ee:Ewe el:Greek
    en:English eo:Esperanto es:Spanish et:Estonian eu:Basque fa:Persian ff:Fula fi:Finnish fj:Fijian
    fo:Faroese fr:French fy:Western_Frisian ga:Irish gd:Scottish_Gaelic gl:Galician gn:Guarani gu:Gujarati
    gv:Manx ha:Hausa he:Hebrew hi:Hindi ho:Hiri_Motu hr:Croatian ht:Haitian_Creole hu:Hungarian hy:Armenian
    hz:Herero ia:Interlingua id:Indonesian ie:Interlingue ig:Igbo ii:Sichuan_Yi ik:Inupiaq io:Ido
    is:Icelandic it:Italian iu:Inuktitut ja:Japanese jv:Javanese ka:Georgian kg:Kongo ki:Kikuyu kj:Kuanyama
    kk:Kazakh kl:Kalaallisut km:Khmer kn:Kannada ko:Korean kr:Kanuri ks:Kashmiri ku:Kurdish kv:Komi
    kw:Cornish ky:Kyrgyz la:Latin lb:Luxembourgish lg:Ganda li:Limburgish ln:Lingala lo:Lao lt:Lithuanian
    lu:Luba-Katanga lv:Latvian mg:Malagasy mh:Marshallese mi:Māori mk:Macedonian ml:Malayalam mn:Mongolian
    mr:Marathi ms:Malay mt:Maltese my:Burmese na:Nauru nb:Norwegian_Bokmål nd:North_Ndebele ne:Nepali
    ng:Ndonga nl:Dutch nn:Norwegian_Nynorsk no:Norwegian nr:South_Ndebele nv:Navajo ny:Nyanja oc:Occitan
    oj:Ojibwa om:Oromo or:Odia os:Ossetic pa:Punjabi pi:Pali pl:Polish ps:Pashto pt:Portuguese qu:Quechua
    rm:Romansh rn:Rundi ro:Romanian ru:Russian rw:Kinyarwanda sa:Sanskrit sc:Sardinian sd:Sindhi
    se:Northern_Sami sg:Sango sh:Serbo-Croatian si:Sinhala sk:Slovak sl:Slovenian sm:Samoan sn:Shona
    so:Somali sq:Albanian sr:Serbian ss:Swati st:Southern_Sotho su:Sundanese sv:Swedish sw:Swahili ta:Tamil
    te:Telugu tg:Tajik th:Thai ti:Tigrinya tk:Turkmen tl:Tagalog tn:Tswana to:Tongan tr:Turkish ts:Tsonga
    tt:Tatar tw:Twi ty:Tahitian ug:Uyghur uk:Ukrainian ur:Urdu uz:Uzbek ve:Venda vi:Vietnamese vo:Volapük
    wa:Walloon wo:Wolof xh:Xhosa yi:Yiddish yo:Yoruba za:Zhuang zh:Chinese zu:Zulu
""".split()
)
"""Code of two letters → English name, with _ for spaces."""
_THREE = {
    three: two
    for one in """
    aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara,arb as:asm av:ava ay:aym,ayr az:aze,azj ba:bak
    be:bel bg:bul bi:bis bm:bam bn:ben bo:bod,tib br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre,cwd
    cs:ces,cze cu:chu cv:chv cy:cym,wel da:dan de:deu,ger dv:div dz:adp,dzo ee:ewe el:ell,gre en:eng eo:epo
    es:spa et:ekk,est eu:baq,eus fa:fas,per,pes ff:fuc,ful fi:fin fj:fij fo:fao fr:fra,fre fy:fry ga:gle
    gd:gla gl:glg gn:grn,gug gu:guj,prp gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv,scr ht:hat hu:hun
    hy:arm,hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii ik:esk,ipk io:ido is:ice,isl it:ita iu:ike,iku
    ja:jpn jv:jav ka:geo,kat kg:kng,kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau,knc ks:kas
    ku:kmr,kur kv:kom,kpv kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav,lvs
    mg:mlg,plt mh:mah mi:mao,mri mk:mac,mkd ml:mal mn:drh,khk,mon mr:mar ms:may,msa,zsm mt:mlt my:bur,mya
    na:nau nb:nob nd:nde ne:nep,npi ng:ndo nl:dut,nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:ojg,oji
    om:gaz,orm or:ori,ory os:oss pa:pan pi:pli pl:pol ps:pbu,pus pt:por qu:que,quz rm:roh rn:run
    ro:mol,ron,rum ru:rus rw:kin sa:cls,san sc:src,srd sd:snd se:sme sg:sag sh:hbs si:sin sk:slk,slo sl:slv
    sm:smo sn:sna so:som sq:alb,als,sqi sr:scc,srp ss:ssw st:sot su:sun sv:swe sw:swa,swh ta:tam te:tel
    tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd
    uz:uzb,uzn ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:ydd,yid yo:yor za:zha,zyb zh:chi,cmn,zho zu:zul
""".split()
    for two, _, codes in [one.partition(":")]
    for three in codes.split(",")
}
_OTHERS = frozenset(
    """
    ace ach ada ady aeb afh agq ain akk akz ale aln alt ang ann anp apw arc arn aro arp arq ars arw ary arz
    asa ase ast atj avk awa bal ban bar bas bax bbc bbj bej bem bew bez bfd bfq bgc bgn bho bik bin bjn bkm
    bla blo blt bpy bqi bra brh brx bss bua bug bum byn byv cad car cay cch ccp ceb cgg chb chg chk chm cho
    chp chr chy cic ckb clc cop cps crg crh crj crk crl crm crr crs csb csw dak dar dav del den dgr din dje
    doi dsb dtp dua dum dyo dyu dzg ebu efi egl egy eka elx enm esu ewo ext fan fat fil fit fon frc frm fro
    frp frr frs fur gaa gag gan gay gba gbz gez gil glk gmh goh gon gor got grb grc gsw guc gur guz gwi hai
    hak haw hax hif hil hit hmn hnj hsb hsn hup hur iba ibb ikt ilo inh izh jam jbo jgo jmc jpr jrb jut kaa
    kab kac kaj kam kaw kbd kbl kcg kde kea kek ken kfo kgp kha kho khq khw kiu kkj kln kmb koi kok kos kpe
    krc kri krj krl kru ksb ksf ksh kum kut kwk kxv lad lag lah lam lez lfn lij lil liv lkt lld lmo lol lou
    loz lrc lsm ltg lua lui lun luo lus luy lzh lzz mad maf mag mai mak man mas mde mdf mdr men mer mfe mga
    mgh mgo mic mid min mnc mni moe moh mos mrj mua mus mwl mwr mwv mye myv mzn nan nap naq nds new nia niu
    njo nmg nnh nnp nog non nov nqo nso nus nwc nym nyn nyo nzi ojb ojc ojs ojw oka osa ota pag pal pam pap
    pau pcd pcm pdc pdt peo pfl phn pis pms pnt pon pqm prg pro quc qug raj rap rar rej rgn rhg rif rof rom
    rtm rue rug rup rwk sad sah sam saq sas sat saz sba sbp scn sco sdc sdh see seh sei sel ses sga sgs shi
    shn shu sid sjd sje sju slh sli sly sma smj smn sms snk sog srn srr ssy stq str suk sus sux swb syc syr
    szl tce tcy tem teo ter tet tgx tht tig tiv tkl tkr tlh tli tly tmh tog tok tpi tru trv trw tsd tsi ttm
    ttt tum tvl twq tyv tzm udm uga umb vai vec vep vls vmf vmw vot vro vun wae wal war was wbp wuu xal xmf
    xnr xog yao yap yav ybb yrl yue zap zbl zea zen zgh zun zza
    gmw gem roa sla zle zls zlw itc inc ira iir trk bat cel fiu urj sem dra mkh poz cpf
""".split()
)
# Codes of countries under which a language is looked for; kr and chn are Kanuri and Chinook too.
_COUNTRIES = dict(
    one.split(":")
    for one in """
    cn:zh chn:zh hk:zh jp:ja kr:ko ua:uk gr:el cz:cs dk:da vn:vi ir:fa il:he by:be ge:ka rs:sr us:en usa:en
    gb:en mx:es at:de pk:ur np:ne bd:bn lk:si kh:km mm:my ph:fil eg:ar kz:kk en_us:en jap:ja
""".split()
)


@functools.cache
def language(code: str) -> str:
    """The code that a language is known by here: `zh` for zh-Hant-TW, zh_CN and cmn."""
    base = regex.split("[-_]", code.lower(), maxsplit=1)[0]
    return str(_THREE.get(base, base))


def check_code(code: str, flag: str) -> None:
    """UsageError for what is no code of a language, with the nearest that is one.

    Script and country may follow (zh_Hant). qaa to qtz are free for languages that have none.
    """
    base = language(code)
    known = base in NAMES or base in _OTHERS or regex.fullmatch("q[a-t][a-z]", base)
    if known and base not in _COUNTRIES:
        return
    near = _nearest(base)
    meant = f": did you mean {near} ({NAMES[near].replace('_', ' ')})?" if near in NAMES else ";"
    raise UsageError(
        f"{flag} {code} is no code of a language{meant} give one of ISO 639, or qaa to qtz for a "
        "language that has none"
    )


def _nearest(base: str) -> str | None:
    if base in _COUNTRIES:
        return _COUNTRIES[base]
    names = {name.lower(): code for code, name in NAMES.items()}
    found = difflib.get_close_matches(base, [*names, *NAMES, *_THREE], 1, 0.6)
    return names.get(found[0], language(found[0])) if found else None
